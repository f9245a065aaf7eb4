"""Cases, options, timing, memory and disk: the tools that every benchmark is made with."""
