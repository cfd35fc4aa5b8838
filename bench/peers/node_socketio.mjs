// Node with the `socket.io` package, websocket transport only.

import { Server } from "socket.io";
import { answer } from "./work.mjs";

const server = new Server({ transports: ["websocket"] });

server.of("/ws").on("connection", (socket) => {
  socket.on("rpc", (request, acknowledge) => {
    const [envelope, news] = answer(request);
    if (news) server.of("/ws").emit("rpc_response", news);
    acknowledge(envelope);
  });
});

server.listen(Number(process.argv[2]));
