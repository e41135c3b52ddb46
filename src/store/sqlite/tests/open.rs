//! Problems with a database, and the messages about them.

use std::path::Path;

use sqlx::migrate::Migrator;
use sqlx::{Connection, SqliteConnection};
use tempfile::{TempDir, tempdir};

use super::{OpenError, SqliteSettings, SqliteStore, open_reader, run};
use crate::store::Store;
use crate::store::sqlite::open::{Purpose, check, copy};

async fn open(path: &Path) -> Result<SqliteStore, OpenError> {
    SqliteStore::open(path, &SqliteSettings::default()).await
}

async fn refusal(path: &Path) -> String {
    open(path)
        .await
        .map(|_| ())
        .expect_err("it must not open")
        .to_string()
}

async fn connect(path: &Path) -> SqliteConnection {
    let url = format!("sqlite://{}?mode=rwc", path.display());
    SqliteConnection::connect(&url).await.unwrap()
}

/// Creates and closes a store, then changes its schema with `sql`.
async fn altered(sql: &str) -> (TempDir, std::path::PathBuf) {
    let directory = tempdir().unwrap();
    let path = directory.path().join("x.db");
    open(&path).await.unwrap().close().await.unwrap();
    let mut conn = connect(&path).await;
    run(&mut conn, sql).await;
    conn.close().await.unwrap();
    (directory, path)
}

#[tokio::test]
async fn settings_hold_on_the_writer() {
    let directory = tempdir().unwrap();
    let path = directory.path().join("x.db");
    let mut store = open(&path).await.unwrap();
    let conn = &mut store.writer.as_mut().unwrap().conn;
    let mode = sqlx::query_scalar("PRAGMA journal_mode")
        .fetch_one(&mut *conn)
        .await;
    let synchronous = sqlx::query_scalar("PRAGMA synchronous")
        .fetch_one(&mut *conn)
        .await;
    let auto = sqlx::query_scalar("PRAGMA wal_autocheckpoint")
        .fetch_one(&mut *conn)
        .await;
    let found: (String, i64, i64) = (mode.unwrap(), synchronous.unwrap(), auto.unwrap());
    assert_eq!(found, ("wal".to_owned(), 2, 0));
}

#[cfg(unix)]
#[tokio::test]
async fn a_new_database_is_private() {
    use std::os::unix::fs::PermissionsExt;
    let directory = tempdir().unwrap();
    let path = directory.path().join("x.db");
    let _store = open(&path).await.unwrap();
    for name in ["x.db", "x.db-wal", "x.db.lock"] {
        let mode = std::fs::metadata(directory.path().join(name))
            .unwrap()
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o600, "{name}");
    }
}

#[tokio::test]
async fn one_gateway_at_a_time() {
    let directory = tempdir().unwrap();
    let path = directory.path().join("x.db");
    let store = open(&path).await.unwrap();
    assert!(refusal(&path).await.contains("in use by another gateway"));
    #[cfg(unix)]
    {
        let link = directory.path().join("link.db");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        assert!(refusal(&link).await.contains("in use by another gateway"));
    }
    store.close().await.unwrap();
    open(&path).await.unwrap();
}

#[tokio::test]
async fn a_file_that_is_not_a_database_is_left_alone() {
    let directory = tempdir().unwrap();
    let path = directory.path().join("notes.txt");
    let text = "not a database, ".repeat(100);
    std::fs::write(&path, &text).unwrap();
    assert!(refusal(&path).await.contains("is not an SQLite database"));
    assert!(
        open_reader(&path)
            .await
            .unwrap_err()
            .to_string()
            .contains("is not an SQLite")
    );
    assert_eq!(std::fs::read_to_string(&path).unwrap(), text);
    assert!(
        refusal(directory.path())
            .await
            .contains("is not an SQLite database")
    );
}

#[tokio::test]
async fn the_database_of_another_program_is_left_alone() {
    let directory = tempdir().unwrap();
    let path = directory.path().join("other.db");
    let mut conn = connect(&path).await;
    run(&mut conn, "CREATE TABLE a(b); CREATE TABLE c(d)").await;
    conn.close().await.unwrap();
    let before = std::fs::read(&path).unwrap();
    assert!(refusal(&path).await.contains("of another program"));
    assert_eq!(std::fs::read(&path).unwrap(), before);
}

#[tokio::test]
async fn a_newer_schema_is_refused() {
    let newer = "INSERT INTO _sqlx_migrations(version, description, success, checksum,
        execution_time) VALUES (9999, 'later', 1, x'00', 0)";
    let (_directory, path) = altered(newer).await;
    let says = refusal(&path).await;
    assert!(
        says.contains("newer Fieldgate") && says.contains("9999"),
        "{says}"
    );
    assert!(!says.contains('\n'));
    assert!(
        open_reader(&path)
            .await
            .unwrap_err()
            .to_string()
            .contains("newer Fieldgate")
    );
}

/// Creates a database as an older version did, with an audit event.
async fn older(version: i64) -> (TempDir, std::path::PathBuf) {
    let directory = tempdir().unwrap();
    let path = directory.path().join("x.db");
    let mut conn = connect(&path).await;
    let migrations = Purpose::Store.migrations().iter();
    let migrations = migrations.filter(|migration| migration.version <= version);
    let migrator = Migrator::with_migrations(migrations.cloned().collect());
    migrator.run(&mut conn).await.unwrap();
    let rows = "INSERT INTO devices (name, enabled) VALUES ('pump', 0);
        INSERT INTO device_events (device_id, at, kind, code, detail)
            SELECT id, 5, 'connected', 0, 'peer' FROM devices";
    run(&mut conn, rows).await;
    conn.close().await.unwrap();
    (directory, path)
}

#[tokio::test]
async fn only_a_gateway_updates_an_older_schema() {
    let (_directory, path) = older(1).await;
    let says = open_reader(&path).await.unwrap_err().to_string();
    assert!(says.contains("older Fieldgate"), "{says}");
    open(&path).await.unwrap().close().await.unwrap();
    let mut reader = open_reader(&path).await.unwrap();
    let found: (String, i64, String, String) = sqlx::query_as(
        "SELECT name, revision, kind, state FROM devices AS d
         JOIN device_events AS e ON e.device_id = d.id JOIN device_status AS s ON s.device = d.name",
    )
    .fetch_one(&mut reader)
    .await
    .unwrap();
    let expected = ("pump", 0, "connected", "new");
    assert_eq!((&*found.0, found.1, &*found.2, &*found.3), expected);
}

#[tokio::test]
async fn a_changed_migration_is_refused() {
    let (_directory, path) = altered("UPDATE _sqlx_migrations SET checksum = x'00'").await;
    assert!(refusal(&path).await.contains("could not update the schema"));
}

#[tokio::test]
async fn paths_that_cannot_be_written() {
    let directory = tempdir().unwrap();
    assert!(
        refusal(&directory.path().join("no/x.db"))
            .await
            .contains("create it")
    );
    let file = directory.path().join("file");
    std::fs::write(&file, "").unwrap();
    assert!(
        refusal(&file.join("x.db"))
            .await
            .contains("could not write")
    );
}

#[tokio::test]
async fn a_reader_needs_a_database_and_cannot_write() {
    let directory = tempdir().unwrap();
    let path = directory.path().join("x.db");
    let says = open_reader(&path).await.unwrap_err().to_string();
    assert!(says.contains("start `fieldgate serve` first"), "{says}");
    std::fs::write(&path, "").unwrap();
    assert!(matches!(
        open_reader(&path).await,
        Err(OpenError::Missing(_))
    ));
    open(&path).await.unwrap().close().await.unwrap();
    let mut reader = open_reader(&path).await.unwrap();
    let insert = sqlx::query("INSERT INTO devices(name) VALUES ('x')")
        .execute(&mut reader)
        .await;
    assert!(insert.is_err());
}

#[tokio::test]
async fn limits_must_make_sense() {
    let directory = tempdir().unwrap();
    let settings = SqliteSettings {
        wal_soft_bytes: 2 << 30,
        ..SqliteSettings::default()
    };
    let opened = SqliteStore::open(directory.path().join("x.db"), &settings).await;
    assert!(matches!(opened, Err(OpenError::Settings(_))));
}

#[tokio::test]
async fn a_damaged_copy_is_found() {
    let directory = tempdir().unwrap();
    let path = directory.path().join("x.db");
    open(&path).await.unwrap().close().await.unwrap();
    let copied = directory.path().join("copy.db");
    std::fs::File::create(&copied).unwrap();
    copy(&path, &copied).await.unwrap();
    check(&copied).await.unwrap();
    // The last page is the root of an index or table; its header gets an impossible type.
    let mut bytes = std::fs::read(&copied).unwrap();
    let page = bytes.len() - 8192;
    bytes[page..page + 64].fill(0xFF);
    std::fs::write(&copied, bytes).unwrap();
    let fault = check(&copied).await.unwrap_err().to_string();
    assert!(fault.contains("is damaged"), "{fault}");
}
