mod asked;
mod cases;
mod flash;
mod flash_dropout;
mod flash_gradient;
mod flash_module;
mod flash_refusal;
mod oracle;
