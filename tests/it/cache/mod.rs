mod batch;
mod file;
mod forms;
mod model;
mod paged;
mod random;
mod rotating;
mod simple;
