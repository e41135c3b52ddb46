//! The SQL of the dashboards in ops/grafana runs on the store that each dashboard is for.

use std::fs;
use std::path::Path;

use serde_json::Value;

use crate::lifecycle::Place;
use crate::support::messages::{event, gap, readings};

/// Returns the title and the SQL of each panel, for the device `pump` and all times.
fn panels(dashboard: &str) -> Vec<(String, String)> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("ops/grafana");
    let text = fs::read_to_string(path.join(dashboard)).expect("a dashboard");
    let dashboard: Value = serde_json::from_str(&text).expect("JSON");
    let panels = dashboard["panels"].as_array().expect("panels");
    let panel = |panel: &Value| {
        let target = &panel["targets"][0];
        let sql = target["queryText"].as_str().or(target["rawSql"].as_str());
        let sql = sql.expect("a query").replace("$device", "pump");
        let sql = sql
            .replace("$__from", "0")
            .replace("$__to", "4102444800000");
        (panel["title"].as_str().expect("a title").to_owned(), sql)
    };
    panels.iter().map(panel).collect()
}

fn each_panel_has_rows(place: &Place, dashboard: &str) {
    let (mut link, _) = place.gateway.connect("pump");
    link.send(&readings(1));
    link.send(&event(2, 1, 7, "started"));
    link.send(&gap(3, 5, 0));
    link.expect_ack(5);
    let panels = panels(dashboard);
    assert_eq!(panels.len(), 6);
    for (title, sql) in panels {
        let rows = place.query(&sql);
        assert!(rows.lines().count() > 1, "{title}: {sql}\n{rows}");
    }
}

#[test]
fn each_panel_about_a_device_has_rows_on_sqlite() {
    each_panel_has_rows(&Place::sqlite(&[]), "device-sqlite.json");
}

#[test]
#[ignore = "needs Postgres: run tests/run, or set FIELDGATE_TEST_POSTGRES_URL and pass --include-ignored"]
fn each_panel_about_a_device_has_rows_on_postgres() {
    each_panel_has_rows(&Place::postgres(&[]), "device-postgres.json");
}
