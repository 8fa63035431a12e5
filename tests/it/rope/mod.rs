mod function;
mod module;
mod oracle;
mod pair;
mod properties;
mod rope_qk;

const OP: &str = "rope";
