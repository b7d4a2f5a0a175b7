"""One file a change of schema, in the order of their numbers. A published file is never changed."""
