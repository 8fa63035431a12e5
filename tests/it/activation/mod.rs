mod oracle;
mod pointwise;
