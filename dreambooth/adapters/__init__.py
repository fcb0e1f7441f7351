"""Methods of training: what learns, how it is attached to a base, and how it is kept. `methods` has the choices of the config."""
