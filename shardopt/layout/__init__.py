"""Where every element lives and what that costs: integers only."""
