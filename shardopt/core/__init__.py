"""The optimizer that every framework's front end has: the only place that knows all parts."""
