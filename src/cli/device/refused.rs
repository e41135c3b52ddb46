//! `fieldgate device refused`.

use std::io::Write;

use crate::config::store_url::StoreUrl;
use crate::store::admin::{Access, Connection};
use clap::Args;

use crate::cli::Error;
use crate::cli::output::{self, show_utc};
use crate::cli::query::{Format, write_at_hand};
use crate::text::code_text;

#[derive(Args, Debug)]
pub struct RefusedArgs {
    /// Output format
    #[arg(long, value_enum, value_name = "FORMAT", default_value_t = Format::Table)]
    format: Format,
}

const HEADERS: [&str; 7] = [
    "last", "first", "count", "peer", "claimed", "code", "reason",
];

/// Lists refused connections, the latest first.
pub async fn refused(store: &StoreUrl, args: &RefusedArgs) -> Result<(), Error> {
    let mut connection = Connection::open(store, Access::Read).await?;
    let sql = "SELECT last_at, first_at, count, peer, device, code, reason FROM refusals
        ORDER BY last_at DESC, id DESC";
    let mut rows = Vec::new();
    for row in connection.rows(sql, &[]).await? {
        let code = row.integer(5)?;
        let mut row = row.0;
        show_utc(&mut row, 0);
        show_utc(&mut row, 1);
        row[5] = match code {
            0 => "".into(),
            code => code_text(code).into(),
        };
        rows.push(row);
    }
    let mut out = output::stdout();
    write_at_hand(args.format, &HEADERS, rows, &mut out)?;
    out.flush().map_err(Error::Output)
}
