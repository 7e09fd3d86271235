"""What every gRPC server and client of Baton shares."""
