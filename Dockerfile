# docker build -t fieldgate .
# docker run -p 7300:7300 -v fieldgate:/var/lib/fieldgate fieldgate
FROM rust:1.94-bookworm AS build
WORKDIR /src
COPY . .
RUN cargo build --release --locked --bin fieldgate

FROM debian:bookworm-slim
RUN useradd --system --home-dir /var/lib/fieldgate --shell /usr/sbin/nologin fieldgate \
    && install -d -m 700 -o fieldgate -g fieldgate /var/lib/fieldgate
COPY --from=build /src/target/release/fieldgate /usr/bin/fieldgate
USER fieldgate
WORKDIR /var/lib/fieldgate
VOLUME /var/lib/fieldgate
EXPOSE 7300
STOPSIGNAL SIGTERM
# The image has no HTTP client, so bash asks the listener.
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s CMD ["/bin/bash", "-c", \
    "exec 3<>/dev/tcp/127.0.0.1/7380 && printf 'GET /livez HTTP/1.0\\r\\nHost: localhost\\r\\n\\r\\n' >&3 && grep -q ' 200 ' <&3"]
ENTRYPOINT ["/usr/bin/fieldgate"]
CMD ["serve", "--data-dir", "/var/lib/fieldgate", "--listen", "0.0.0.0:7300", "--allow-plaintext"]
