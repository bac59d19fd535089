"""What a response is worth: functions, verifiers, services, reward models, and their gated sum.

A row without a reward is NaN here, never 0. Imports core to data."""
