//! `/openapi.json`: the description of the API for programs. A test compares it with the routes.

use axum::Json;
use serde_json::{Value, json};

use super::devices::{LATEST_MAX, PAGE_DEFAULT, PAGE_MAX};
use super::problem::{Nothing, Parameters};
use super::query::{BODY_BYTES_MAX, QUERY_TIMEOUT};
use crate::store::admin::presence::Presence;

/// Answers with the description.
pub(super) async fn openapi(Parameters(Nothing {}): Parameters<Nothing>) -> Json<Value> {
    Json(description())
}

/// Returns the description, in the format of OpenAPI 3.1.
pub(super) fn description() -> Value {
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "Fieldgate",
            "version": env!("CARGO_PKG_VERSION"),
            "description": "Reads devices and readings from a gateway. Times are integer microseconds since \
                1970-01-01T00:00:00Z.",
            "license": {"name": "MIT OR Apache-2.0", "identifier": "MIT OR Apache-2.0"},
        },
        "security": [{}, {"token": []}],
        "paths": {
            "/v1/devices": {"get": devices()},
            "/v1/devices/{name}": {"get": device()},
            "/v1/devices/{name}/latest": {"get": latest()},
            "/v1/query": {"post": query()},
            "/v1/feed": {"get": feed()},
            "/v1/feed/ws": {"get": feed_ws()},
        },
        "components": {
            "securitySchemes": {"token": {
                "type": "http",
                "scheme": "bearer",
                "description": "Needed if the gateway has --http-token-file.",
            }},
            "responses": {"problem": {
                "description": "The request was refused, or failed.",
                "content": content(&reference("schemas", "Problem")),
            }},
            "schemas": schemas(),
        },
    })
}

fn reference(kind: &str, name: &str) -> Value {
    json!({"$ref": format!("#/components/{kind}/{name}")})
}

fn content(schema: &Value) -> Value {
    json!({"application/json": {"schema": schema}})
}

/// Returns the responses of an operation that succeeds with `content`, and refuses requests with `codes`.
fn responses(description: &str, content: &Value, codes: &[u16]) -> Value {
    let mut responses = json!({"200": {"description": description, "content": content}});
    for code in [&[400, 401, 403, 421, 503], codes].concat() {
        responses[code.to_string()] = reference("responses", "problem");
    }
    responses
}

fn parameter(name: &str, description: &str, schema: &Value) -> Value {
    json!({"name": name, "in": "query", "description": description, "schema": schema})
}

/// Schema of a text that is compared with a text in the store; the stores keep no NUL.
fn storable_text() -> Value {
    json!({"type": "string", "pattern": "^[^\\u0000]*$"})
}

fn name() -> Value {
    json!({
        "name": "name",
        "in": "path",
        "required": true,
        "description": "Name of a device.",
        "schema": storable_text(),
    })
}

fn devices() -> Value {
    let states = Presence::ALL.map(Presence::name);
    json!({
        "summary": "Devices in the order of their names",
        "operationId": "listDevices",
        "parameters": [
            parameter("state", "Only devices with this presence.", &json!({"type": "string", "enum": states})),
            parameter("prefix", "Only devices whose name begins with this text.", &storable_text()),
            parameter("after", "Cursor: `next` of the page before.", &storable_text()),
            parameter("limit", "Maximum number of devices.", &json!({
                "type": "integer", "minimum": 1, "maximum": PAGE_MAX, "default": PAGE_DEFAULT,
            })),
        ],
        "responses": responses("A page of devices", &content(&json!({
            "type": "object",
            "required": ["devices", "next"],
            "properties": {
                "devices": {"type": "array", "items": reference("schemas", "Device")},
                "next": {"type": ["string", "null"], "description": "Cursor of the next page, if there is one."},
            },
        })), &[]),
    })
}

fn device() -> Value {
    json!({
        "summary": "One device",
        "operationId": "showDevice",
        "parameters": [name()],
        "responses": responses("The device", &content(&reference("schemas", "Device")), &[404]),
    })
}

fn latest() -> Value {
    json!({
        "summary": "Newest plausible reading of each series of a device",
        "description": format!("At most {LATEST_MAX} series, in the order of their channels."),
        "operationId": "showLatest",
        "parameters": [name()],
        "responses": responses("The readings", &content(&json!({
            "type": "object",
            "required": ["device", "latest"],
            "properties": {
                "device": {"type": "string"},
                "latest": {"type": "array", "items": reference("schemas", "Newest")},
            },
        })), &[404]),
    })
}

fn query() -> Value {
    let description = format!(
        "Runs one statement that reads, within {} s. The answer is streamed; if the statement fails after its first \
         rows, the answer ends early, without the end of the array.",
        QUERY_TIMEOUT.as_secs()
    );
    json!({
        "summary": "Rows of an SQL statement",
        "description": description,
        "operationId": "query",
        "requestBody": {
            "required": true,
            "description": format!("At most {BODY_BYTES_MAX} bytes."),
            "content": {"application/json": {
                "schema": {
                    "type": "object",
                    "required": ["sql"],
                    "additionalProperties": false,
                    "properties": {
                        "sql": {"type": "string"},
                        "params": {
                            "description": "Values of $1, $2, …",
                            "type": "array",
                            "items": {"type": ["string", "number", "boolean", "null"]},
                        },
                    },
                },
                "example": {
                    "sql": "SELECT device, frames FROM device_status WHERE presence = $1",
                    "params": ["online"],
                },
            }},
        },
        "responses": responses("The rows: an object for each, with its columns as keys", &content(&json!({
            "type": "array",
            "items": {"type": "object"},
        })), &[408, 413, 415, 504]),
    })
}

fn cursor(description: &str) -> Vec<Value> {
    vec![
        parameter(
            "after",
            description,
            &json!({"type": "integer", "format": "int64", "minimum": 0}),
        ),
        parameter("device", "Only readings of this device.", &storable_text()),
        parameter(
            "channel",
            "Only readings of channels with this name.",
            &storable_text(),
        ),
    ]
}

fn feed() -> Value {
    let mut parameters =
        cursor("Cursor: `id` of the last event. Without it, the feed begins with the next frame.");
    parameters.push(json!({
        "name": "Last-Event-ID",
        "in": "header",
        "description": "Cursor, used instead of `after`.",
        "schema": {"type": "string", "pattern": "^[0-9]+$"},
    }));
    json!({
        "summary": "Committed readings as server-sent events",
        "description": "The data of each event is an Event.",
        "operationId": "feed",
        "parameters": parameters,
        "responses": responses("Events without end", &json!({
            "text/event-stream": {"schema": {"type": "string"}},
        }), &[409]),
    })
}

fn feed_ws() -> Value {
    let mut responses = responses("", &json!({}), &[409, 426]);
    responses.as_object_mut().expect("an object").remove("200");
    responses["101"] = json!({"description": "Messages without end"});
    json!({
        "summary": "Committed readings over a WebSocket",
        "description": "Each text message is an Event, {\"cursor\": ID} or {\"reset\": true}.",
        "operationId": "feedOverWebSocket",
        "parameters": cursor("Cursor: `frame_id` of the last event, or `cursor`. Without it, the feed begins with the \
            next frame."),
        "responses": responses,
    })
}

fn object(properties: Value) -> Value {
    let required: Vec<&String> = properties.as_object().expect("an object").keys().collect();
    let required = json!(required);
    json!({"type": "object", "required": required, "additionalProperties": false, "properties": properties})
}

fn schemas() -> Value {
    let states = Presence::ALL.map(Presence::name);
    let text = || json!({"type": "string"});
    let integer = || json!({"type": "integer", "format": "int64"});
    let time = || json!({"type": "integer", "format": "int64", "description": "Microseconds UTC."});
    let time_or_null = || json!({"type": ["integer", "null"], "format": "int64", "description": "Microseconds UTC."});
    let quality = || json!({"enum": ["utc", "anchored", "unanchored", "suspect", null]});
    let value = || {
        json!({
            "description": "null: sampled, but no valid value.",
            "anyOf": [{"type": ["number", "null"]}, {"enum": ["Infinity", "-Infinity"]}],
        })
    };
    json!({
        "Problem": object(json!({
            "error": {"type": "string", "description": "What is wrong."},
            "fix": {"type": "string", "description": "What to do."},
        })),
        "Device": object(json!({
            "device": text(),
            "enabled": {"type": "boolean"},
            "state": {"enum": ["connected", "disconnected", "new"]},
            "presence": {"enum": states},
            "interval_s": {"type": "integer", "description": "Expected time between two frames."},
            "is_interval_set": {"type": "boolean", "description": "Whether an operator set the interval."},
            "firmware": {"type": ["string", "null"]},
            "first_seen_at": time_or_null(),
            "last_seen_at": time_or_null(),
            "last_frame_at": time_or_null(),
            "frames": integer(),
            "readings": integer(),
            "missing": {"type": "integer", "description": "Lost frames."},
            "quarantined": {"type": "integer", "description": "Frames in quarantine."},
        })),
        "Newest": object(json!({
            "channel": text(),
            "unit": text(),
            "kind": text(),
            "ts": time(),
            "value": value(),
            "received_at": time(),
            "quality": quality(),
        })),
        "Event": object(json!({
            "frame_id": integer(),
            "device": text(),
            "stream": integer(),
            "seq": integer(),
            "received_at": time(),
            "quality": quality(),
            "readings": {"type": "array", "items": object(json!({
                "channel": text(),
                "unit": text(),
                "ts": time(),
                "value": value(),
            }))},
        })),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_description_has_every_route() {
        let description = description();
        let mut described = Vec::new();
        for (path, operations) in description["paths"].as_object().expect("paths") {
            for (method, operation) in operations.as_object().expect("operations") {
                described.push(format!("{method} {path}"));
                assert!(operation["responses"]["400"].is_object(), "{path}");
            }
        }
        let routes = super::super::routes().into_iter();
        let mut routes: Vec<_> = routes
            .map(|(path, method, _)| format!("{method} /v1{path}"))
            .collect();
        described.sort();
        routes.sort();
        assert_eq!(described, routes);
    }
}
