"""What every room stands on: the arrays that flow, masked means, bad input, files, statistics.

No model, no mesh, no config. Imports nothing of the package. ``errors``, ``files`` and ``stats``
import no jax either."""
