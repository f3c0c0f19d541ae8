"""What a recipe names, opened and checked before anything heavy is done."""
