"""Mixed-precision training for JAX: transforms, a framework, and instruments."""
