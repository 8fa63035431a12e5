//! Sets up, tests, benches and bundles the workspace.
fn main() {}
