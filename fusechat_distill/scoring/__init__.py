"""What a model thinks of every answer: engines, the output head in tiles, the score stage."""
