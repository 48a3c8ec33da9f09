"""Cards: the schema, the catalogue that finds them, the glossary."""
