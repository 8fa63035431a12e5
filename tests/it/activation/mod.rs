mod glu;
mod oracle;
mod pointwise;
