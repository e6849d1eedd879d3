"""What is measured and shown: profiles, comparisons, tables, pictures, pages."""
