mod function;
mod module;
mod oracle;
mod properties;

const OP: &str = "rope";
