//! Operating system services: files, file descriptors, standard error.

pub mod disk;
pub mod gateway_id;
pub mod log;
pub mod open_files;
pub mod secret_file;
pub mod service;
