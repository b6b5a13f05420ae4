"""Parts for `retina` that live in a package of their own: a loss, an assigner and a backbone. See docs/plugins.md."""
