"""Where arrays lie: on devices, over processes, in host memory, on disk.

No model and no algorithm. Imports core and config."""
