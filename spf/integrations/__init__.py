"""SafetyCallback in other frameworks, one small file each; docs/frameworks/ has a page for each."""
