"""A model's distributions over every answer: engines, the output head in tiles, the stage."""
