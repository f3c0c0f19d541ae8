"""How well each source arrives: the tables and pictures of `report/`."""
