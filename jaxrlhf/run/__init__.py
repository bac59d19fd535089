"""One run: set up, looped over, saved, recorded, shown.

``loop`` holds the only two loops. Imports core to rewards."""
