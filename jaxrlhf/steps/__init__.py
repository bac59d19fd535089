"""The jitted steps: sample, score (log-probs, values, rewards), update; and the losses they join.

Pure functions of arrays: no files, no rows of text, no host loop. Imports core to models."""
