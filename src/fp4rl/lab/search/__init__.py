"""The search of a space of recipes: screened on validation problems, judged once on the test split by fresh seeds."""
