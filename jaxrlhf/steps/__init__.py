"""The jitted steps: draw responses (sampling), score rows (scoring), learn (updating)."""
