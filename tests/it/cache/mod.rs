mod paged;
mod simple;
