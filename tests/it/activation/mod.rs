mod glu;
mod oracle;
mod pointwise;
mod swish;
