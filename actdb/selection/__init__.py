"""Reading: a pure plan from a selection to chunk reads, the reader that carries it out, and the lazy view on both."""
