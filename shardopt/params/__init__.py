"""The user's side: param groups, parameters, and how a framework's objects are read and bound."""
