"""The jitted steps: draw responses (sampling), score rows (scoring), learn (updating); and all of
an iteration in one (iteration)."""
