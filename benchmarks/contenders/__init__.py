"""The contenders: shardopt, and what its users would run otherwise."""
