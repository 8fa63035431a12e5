mod cases;
mod flash;
mod oracle;
