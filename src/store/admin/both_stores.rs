//! Runs the same test against SQLite and Postgres.

/// Makes two tests of each function, which gets the URL of an empty store.
macro_rules! in_both_stores {
    ($($case:ident)*) => {$(
        mod $case {
            use crate::config::store_url::StoreUrl;
            use crate::store::Store as _;
            use crate::store::postgres::{PostgresStore, tests::Database};
            use crate::store::sqlite::{SqliteSettings, SqliteStore};

            #[tokio::test]
            async fn in_sqlite() {
                let directory = tempfile::tempdir().unwrap();
                let path = directory.path().join("a.db");
                let store = SqliteStore::open(&path, &SqliteSettings::default()).await;
                super::$case(StoreUrl::Sqlite(path)).await;
                store.unwrap().close().await.unwrap();
            }

            #[tokio::test]
            #[ignore = "needs Postgres: run tests/run, or set FIELDGATE_TEST_POSTGRES_URL and pass --include-ignored"]
            async fn in_postgres() {
                let database = Database::create().await;
                let store = PostgresStore::open(database.settings()).await;
                super::$case(StoreUrl::Postgres(database.settings().url)).await;
                drop(store.unwrap());
            }
        }
    )*};
}
