//! The example device of the protocol crate, against a gateway.

use crate::support::gateway::Gateway;

#[allow(dead_code, missing_docs, reason = "it is a program")]
#[path = "../../protocol/examples/device.rs"]
mod device;

#[test]
fn the_example_device_stores_its_readings() {
    let gateway = Gateway::start(&[]);
    let key = gateway.device("pump-7").key;
    device::send(&gateway.addr.to_string(), "pump-7", key).expect("an ACK");
    let values: Vec<(f64,)> = gateway
        .database()
        .rows("SELECT value FROM telemetry WHERE channel = 'temperature' ORDER BY ts");
    assert_eq!(values, [(21.57,), (21.58,), (21.56,)]);
    let refused = device::send(&gateway.addr.to_string(), "pump-7", [0; 32]);
    let reason = refused.expect_err("another key").to_string();
    assert_eq!(reason, "the gateway closed the connection: authentication");
}
