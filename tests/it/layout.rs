//! The order of the folders of `src`: each imports only from folders below it in `src/lib.rs`. And what the
//! simulator may import from there.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

/// Returns the folders, the highest first.
fn order(lib: &str) -> Vec<&str> {
    let lines = lib
        .lines()
        .map(|line| line.strip_prefix("pub ").unwrap_or(line));
    let modules = lines.filter_map(|line| line.strip_prefix("mod ")?.strip_suffix(';'));
    modules.collect()
}

/// Returns the lines of `source`, a file of `folder`, that import from a folder above.
fn upward<'s>(order: &[&str], folder: &str, source: &'s str) -> Vec<&'s str> {
    let rank: HashMap<&str, usize> = order.iter().copied().zip(0..).collect();
    let imports_from_above = |line: &&str| {
        line.split("crate::").skip(1).any(|path| {
            let end = path.find(|c: char| !c.is_alphanumeric() && c != '_');
            let other = &path[..end.unwrap_or(path.len())];
            rank.get(other).is_some_and(|other| *other < rank[folder])
        })
    };
    source.lines().filter(imports_from_above).collect()
}

/// Calls `found` with each Rust file below `dir`.
fn each_file(dir: &Path, found: &mut impl FnMut(&Path)) {
    for entry in fs::read_dir(dir).expect("a folder") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            each_file(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found(&path);
        }
    }
}

#[test]
fn folders_import_only_from_those_below() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let lib = fs::read_to_string(src.join("lib.rs")).expect("lib.rs");
    let order = order(&lib);
    let mut files = 0;
    for folder in &order {
        each_file(&src.join(folder), &mut |path| {
            files += 1;
            let source = fs::read_to_string(path).expect("a source");
            let lines = upward(&order, folder, &source);
            let path = path.display();
            assert!(
                lines.is_empty(),
                "{path} imports from a folder above it: {lines:?}"
            );
        });
    }
    assert!(files > 100, "{files}");
}

/// Modules of the gateway that the simulator may import, by its folders: the first whose folder contains the file.
/// The verifier shares no code that judges, stores or reads frames.
const SIMULATOR_MAY_IMPORT: [(&str, &[&str]); 3] = [
    ("verify", &["config::store_url::"]),
    (
        "bench",
        &["auth::fleet_key::", "config::", "internals::", "sys::"],
    ),
    (
        "",
        &[
            "auth::fleet_key::",
            "config::",
            "net::",
            "recording::",
            "sys::",
        ],
    ),
];

/// Returns the lines of `source`, the simulator's file `path`, that import what it may not.
fn not_shared<'s>(path: &Path, source: &'s str) -> Vec<&'s str> {
    let rule = { SIMULATOR_MAY_IMPORT.iter() }.find(|(folder, _)| path.starts_with(folder));
    let (_, allowed) = rule.expect("the last one contains every file");
    let is_not_shared = |line: &&str| {
        let mut imports = line.split("fieldgate::").skip(1);
        imports.any(|import| !allowed.iter().any(|module| import.starts_with(module)))
    };
    source.lines().filter(is_not_shared).collect()
}

#[test]
fn the_simulator_imports_nothing_that_it_proves() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("simulator/src");
    let mut files = 0;
    each_file(&src, &mut |path| {
        files += 1;
        let source = fs::read_to_string(path).expect("a source");
        let lines = not_shared(path.strip_prefix(&src).expect("below it"), &source);
        let path = path.display();
        assert!(lines.is_empty(), "{path} must not import: {lines:?}");
    });
    assert!(files > 30, "{files}");
    let planted = "use fieldgate::store::admin::Connection;";
    for path in ["verify/store.rs", "bench/mod.rs", "plan.rs"] {
        assert_eq!(not_shared(Path::new(path), planted), [planted], "{path}");
    }
}

#[test]
fn a_planted_import_is_found() {
    let order = ["server", "session", "store"];
    let source =
        "use crate::store::Receipt;\nuse crate::session::Close;\nuse crate::server::{self};\n";
    assert_eq!(
        upward(&order, "session", source),
        ["use crate::server::{self};"]
    );
    assert_eq!(upward(&order, "store", source).len(), 2);
    assert!(upward(&order, "server", source).is_empty());
}
