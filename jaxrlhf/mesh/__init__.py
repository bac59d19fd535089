"""Where arrays lie: on devices, over processes, in host memory, on disk; and when all must end.

No model and no algorithm: arrays have names and axes, no meaning. Imports core and config."""
