mod function;
mod oracle;
mod properties;

const OP: &str = "rope";
