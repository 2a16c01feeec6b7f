import Foundation
import XCTest

@testable import RWKVEdge

final class ManifestTests: XCTestCase {
    func testFields() throws {
        let manifest = try Goldens.manifest()
        XCTAssertEqual(manifest.spec.version, "7")
        XCTAssertEqual(manifest.spec.nVocab, 16)
        XCTAssertEqual(manifest.state.count, 6)
        XCTAssertEqual(manifest.state[1], Manifest.StateTensor(name: "0.wkv", shape: [2, 2, 2], first: -10000, factor: 16))
        XCTAssertEqual(manifest.graphs.map(\.function), ["decode", "prefill"])
        XCTAssertEqual(manifest.graphs.map(\.nTokens), [1, 16])
        XCTAssertEqual(manifest.graphs[0].packed?.rows["wkv"], [2, 6])
        XCTAssertEqual(manifest.graphs[0].inputs, [Manifest.Value(name: "tokens", dtype: "int32", shape: [1])])
        XCTAssertEqual(manifest.sampling.topP, 0.7)
        XCTAssertNil(manifest.tokenizer)
        XCTAssertNil(manifest.initialState)
        XCTAssertNil(manifest.prompt)
    }

    func testWhatCannotBeReadIsRefused() {
        assertThrows("format 2") { try Goldens.manifest(format: 2) }
        assertThrows("exported for onnx") { try Goldens.manifest(target: "onnx") }
        assertThrows("damaged") { try Manifest.decode(Data("{}".utf8)) }
        assertThrows("damaged") { try Manifest.decode(Data("nothing".utf8)) }
        assertThrows("damaged") { try Manifest.decode(Data(#"{"format": 1, "graphs": []}"#.utf8)) }
        // a newer format is named as such, whatever else it holds
        assertThrows("update the app") { try Manifest.decode(Data(#"{"format": 3}"#.utf8)) }
    }

    func testAFolderWithoutAManifestIsNoBundle() {
        assertThrows("no manifest.json") { try ModelBundle(folder: FileManager.default.temporaryDirectory.appendingPathComponent(UUID().uuidString)) }
    }

    private func open(_ json: String) throws -> ModelBundle {
        let folder = FileManager.default.temporaryDirectory.appendingPathComponent(UUID().uuidString)
        defer { try? FileManager.default.removeItem(at: folder) }
        let package = folder.appendingPathComponent("model.mlpackage")
        try FileManager.default.createDirectory(at: package, withIntermediateDirectories: true)
        try Data(json.utf8).write(to: folder.appendingPathComponent("manifest.json"))
        try Data("{}".utf8).write(to: package.appendingPathComponent("Manifest.json"))
        return try ModelBundle(folder: folder)
    }

    private func layer(_ i: Int, rows: String = Goldens.rows) -> String {
        #""packed": {"name": "rwkv_state", "shape": [1, 8, 2], "first_layer": \#(i), "rows": \#(rows)}"#
    }

    func testTheStateMayLieInSeveralParts() throws {
        XCTAssertNoThrow(try open(Goldens.json()))
        // the last part has the head alone, and no state
        let bundle = try open(Goldens.json(parts: [layer(0), layer(1), ""]))
        XCTAssertEqual(bundle.manifest.graphs[1].packed?.places["1.wkv"], 4..<12)
        XCTAssertNil(bundle.manifest.graphs[2].packed)
    }

    func testPartsThatDoNotKeepTheWholeStateAreRefused() {
        for parts in [[layer(0), ""], [layer(0), layer(0)], [layer(0), layer(1), layer(1)], [""], [layer(0), layer(2)]] {
            assertThrows("do not keep the state") { try open(Goldens.json(parts: parts)) }
        }
        let short = layer(1, rows: #"{"att_x": [0, 2], "wkv": [2, 5], "ffn_x": [6, 8]}"#)
        assertThrows("do not keep the state") { try open(Goldens.json(parts: [layer(0), short])) }
        let outside = layer(1, rows: #"{"att_x": [0, 2], "wkv": [2, 6], "ffn_x": [6, 9]}"#)
        assertThrows("(layers, rows, width)") { try open(Goldens.json(parts: [layer(0), outside])) }
        assertThrows("update the app") { try open(Goldens.json(state: "folded")) }
        assertThrows("do not keep the state") { try open(Goldens.json(state: "explicit", parts: [""])) }
        let huge = Goldens.json().replacingOccurrences(of: "[2, 8, 2]", with: "[16777216, 16777216, 16777216]")
        assertThrows("sizes that cannot be") { try open(huge) }
    }

    func testChatTemplate() throws {
        let json = #"""
            {"system": "System: {}\n\n", "user": "User: {}\n\n", "assistant": "Assistant:", "turn_end": "\n\n",
             "stop": ["\n\nUser:"], "blank_lines": "collapse", "think": {"none": {"opening": "", "sampling": null}, "fast": {"opening": " <think>\n</think", "sampling": null}}}
            """#
        let template = try JSONDecoder().decode(ChatTemplate.self, from: Data(json.utf8))
        XCTAssertEqual(try template.turn("Hi\n\nthere ", isFirst: true).text, "User: Hi\nthere\n\nAssistant:")
        XCTAssertEqual(try template.turn("Hi", isFirst: false).text, "\n\nUser: Hi\n\nAssistant:")
        XCTAssertEqual(
            try template.turn("Hi", system: "Be kind.", isFirst: true, thinking: "fast").text,
            "System: Be kind.\n\nUser: Hi\n\nAssistant: <think>\n</think")
        XCTAssertEqual(try template.turn("Hi", system: "", isFirst: true).text, "User: Hi\n\nAssistant:")
        // white space and line breaks as Python's runtime has them
        for (message, expected) in [
            ("def f(x):\n    if x:\n\treturn 1", "def f(x):\n    if x:\n\treturn 1"), ("\n \n  a\n\n", "a"), (" How? ", "How?"),
            ("\n    a = 1\n    b = 2\n", "    a = 1\n    b = 2"), ("a\n \t \n\n  b", "a\n  b"), ("a\r\n\r\nb\rc", "a\nb\rc"),
            ("a\r\nb", "a\r\nb"), ("a\n\rb", "a\nb"), ("a\u{2028}\u{2028}b", "a\nb"), ("\u{A0}\u{3000}a\t\u{1F}", "a\t\u{1F}"),
            ("\u{200B}a", "\u{200B}a"), (" \n\u{85}\n", ""), ("a \u{301}", "a \u{301}"), ("{}", "{}"),
        ] {
            XCTAssertEqual(Array(try template.turn(message, isFirst: true).text.utf8), Array("User: \(expected)\n\nAssistant:".utf8))
        }
        XCTAssertEqual(ChatTemplate.message("\n a\n\n b\n\n", .keep), " a\n\n b")
        assertThrows("unknown") { try template.turn("Hi", isFirst: true, thinking: "slowly") }
    }
}
