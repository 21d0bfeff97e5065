"""What the reports of demo, benchmark and study share: figures over seeds, tables, charts and pages."""
