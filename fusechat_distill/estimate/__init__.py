"""What a run will cost in disk, memory and time, before it is started."""
