"""What a response is worth: functions, verifiers, services, reward models, and their gated sum.

Only what asks and judges: reward models are trained in run, as any model. A row without a reward is
NaN here, never 0. Imports core to data; functions, verifiers and isolation, which worker processes
start with, import core and config alone, and so never jax."""
