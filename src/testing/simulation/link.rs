//! A connection's bytes in transit.

use fieldgate_protocol::device::Fault;
use fieldgate_protocol::error::Code;

/// Capacity of a socket, in bytes.
const BYTES_MAX: usize = 2_000;

pub(super) type LinkId = u64;

pub(super) struct Link {
    pub device: usize,
    pub to_gateway: Vec<u8>,
    pub to_device: Vec<u8>,
    pub is_device_end_open: bool,
    /// Whether the gateway will see that the device's end is closed.
    pub is_close_notified: bool,
    pub is_gateway_end_open: bool,
    pub was_damaged: bool,
    /// Number of frames that will be damaged, including resent ones.
    pub noisy_frames: u64,
    is_calm: bool,
}

impl Link {
    pub(super) fn new(device: usize, is_calm: bool) -> Link {
        Link {
            device,
            to_gateway: Vec::new(),
            to_device: Vec::new(),
            is_device_end_open: true,
            is_close_notified: false,
            is_gateway_end_open: true,
            was_damaged: false,
            noisy_frames: 0,
            is_calm,
        }
    }

    pub(super) fn is_full(&self) -> bool {
        self.to_gateway.len() >= BYTES_MAX
    }

    pub(super) fn is_open(&self) -> bool {
        self.is_device_end_open || self.is_gateway_end_open
    }

    pub(super) fn close_device_end(&mut self) {
        self.is_device_end_open = false;
        self.to_device.clear();
    }

    pub(super) fn close_gateway_end(&mut self) {
        self.is_gateway_end_open = false;
        self.to_gateway.clear();
    }

    /// Verifies that on an undamaged connection a device detects no fault, and receives only the BYEs that
    /// its own silence, reboots and malformed frames explain.
    pub(super) fn check_fault(&self, fault: Fault) {
        if self.was_damaged {
            return;
        }
        match fault {
            Fault::Timeout => assert!(!self.is_calm, "a timeout on a connection without faults"),
            Fault::Bye {
                code,
                retry_after_ms,
            } => {
                let is_explained = match Code::from_wire(code) {
                    Some(Code::TakenOver | Code::Idle) => true,
                    Some(Code::Protocol) => retry_after_ms > 0,
                    _ => false,
                };
                assert!(is_explained, "BYE {code} on a connection without faults");
            }
            fault => panic!("{fault:?} on a connection without faults"),
        }
    }
}
