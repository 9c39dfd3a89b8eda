"""How many tokens a round drafts: measured costs, counted acceptance, and the rule made of both."""
