"""What a run will take, found by compiling its programs for devices that need not be here."""
